"""Types by layer while loading: python examples/python/topology.py --model Qwen/Qwen2-VL-2B-Instruct.

topology.yaml gives the first layers 8 bits and the others 4; --isq is for what it does not name.
"""

import argparse
from pathlib import Path

import mlxvlm

HERE = Path(__file__).parent
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo")
parser.add_argument("--isq")
parser.add_argument("--topology", default=HERE / "topology.yaml", type=Path)
parser.add_argument("--image", default=str(HERE.parent / "pictures" / "red-heart-black-square.png"))
args = parser.parse_args()

with mlxvlm.load(args.model, isq=args.isq, topology=args.topology, isq_cache=False) as engine:
    print(f"{engine.stats().model_bytes / 1e6:.1f} MB")
    print(engine.generate("What do you see?", args.image, max_tokens=100).text)
