"""mistral.rs's builders: python examples/python/builders.py --model meta-llama/Llama-4-Scout-17B-16E-Instruct."""

import argparse
from pathlib import Path

from PIL import Image

from mlxvlm import IsqType, TextMessageRole, VisionMessages, VisionModelBuilder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo")
parser.add_argument("--image", default=str(Path(__file__).parent.parent / "pictures" / "red-heart-black-square.png"))
args = parser.parse_args()

builder = VisionModelBuilder(args.model)
if args.model != "demo":
    builder.with_isq(IsqType.Q4K).with_logging()

with builder.build() as model:
    image = Image.open(args.image)
    messages = VisionMessages().add_image_message(TextMessageRole.User, "What is this?", [image])
    response = model.send_chat_request(messages)
    print(response.choices[0].message.content)
    print(response.usage.avg_prompt_tok_per_sec, response.usage.avg_compl_tok_per_sec)
