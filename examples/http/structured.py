"""An answer that is JSON after a schema: python examples/http/structured.py."""

import argparse
import json
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--url", default="http://localhost:1234/v1/")
parser.add_argument("--image", default=str(Path(__file__).parent.parent / "pictures" / "red-heart-black-square.png"))
args = parser.parse_args()

client = OpenAI(api_key="foobar", base_url=args.url)
shape = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "square", "heart", "star"]}, "color": {"type": "string"}},
    "required": ["shape", "color"],
    "additionalProperties": False,
}
schema = {"name": "shapes", "strict": True, "schema": {"type": "array", "items": shape, "minItems": 1, "maxItems": 3}}
picture = {"type": "image_url", "image_url": {"url": args.image}}
completion = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": [picture, {"type": "text", "text": "Describe this image as JSON."}]}],
    response_format={"type": "json_schema", "json_schema": schema},
    max_tokens=256,
)
for each in json.loads(completion.choices[0].message.content):
    print(each["shape"], "is", each["color"])
