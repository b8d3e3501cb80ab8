"""SmolVLM describes a picture.

python examples/python/smolvlm.py --model HuggingFaceTB/SmolVLM-Instruct --isq 4
"""

import argparse
from pathlib import Path

import mlxvlm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo")
parser.add_argument("--isq")
parser.add_argument("--image", default=str(Path(__file__).parent.parent / "pictures" / "red-heart-black-square.png"))
args = parser.parse_args()

with mlxvlm.load(args.model, isq=args.isq) as engine:
    with engine.stream("What do you see?", images=[args.image], max_tokens=256) as answer:
        for delta in answer:
            print(delta.text, end="", flush=True)
            usage = delta.usage
    if usage is not None:
        print(f"\n{usage.prompt_tokens} + {usage.completion_tokens} tokens, {usage.image_tokens} of the picture")
