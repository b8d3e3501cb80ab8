"""Idefics 3 by mistral.rs's API.

python examples/runner/idefics3.py --model HuggingFaceM4/Idefics3-8B-Llama3 --isq 4
"""

import argparse
from pathlib import Path

from mlxvlm import ChatCompletionRequest, Runner, VisionArchitecture, Which

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo")
parser.add_argument("--isq")
parser.add_argument("--image", default=str(Path(__file__).parent.parent / "pictures" / "red-heart-black-square.png"))
args = parser.parse_args()

arch = None if args.model == "demo" else VisionArchitecture.Idefics3
which = Which.VisionPlain(model_id=args.model, arch=arch)
with Runner(which=which, in_situ_quant=args.isq) as runner:
    res = runner.send_chat_completion_request(
        ChatCompletionRequest(
            model="default",
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": args.image}},
                        {"type": "text", "text": "What do you see?"},
                    ],
                }
            ],
            max_tokens=256,
            presence_penalty=1.0,
            top_p=0.1,
            temperature=0.1,
        )
    )
    print(res.choices[0].message.content)
    print(res.usage)
