"""An answer that is JSON after a schema: python examples/python/structured.py --model Qwen/Qwen2-VL-2B-Instruct."""

import argparse
import json
from pathlib import Path

import mlxvlm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo")
parser.add_argument("--image", default=str(Path(__file__).parent.parent / "pictures" / "red-heart-black-square.png"))
args = parser.parse_args()

SHAPE = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "square", "heart", "star"]}, "color": {"type": "string"}},
    "required": ["shape", "color"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": SHAPE, "minItems": 1, "maxItems": 3}

with mlxvlm.load(args.model) as engine:
    grammar = mlxvlm.Grammar("json_schema", SCHEMA)
    answer = engine.generate("Describe this image as JSON.", args.image, grammar=grammar, max_tokens=256)
for each in json.loads(answer.text):
    print(each["shape"], "is", each["color"])
