"""A picture inside the request, for a server on another machine: python examples/http/base64_picture.py."""

import argparse
import base64
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--url", default="http://localhost:1234/v1/")
parser.add_argument("--image", default=str(Path(__file__).parent.parent / "pictures" / "red-heart-black-square.png"))
args = parser.parse_args()

client = OpenAI(api_key="foobar", base_url=args.url)
data = base64.b64encode(Path(args.image).read_bytes()).decode()
stream = client.chat.completions.create(
    model="default",
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
                {"type": "text", "text": "What do you see?"},
            ],
        }
    ],
    max_tokens=256,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
