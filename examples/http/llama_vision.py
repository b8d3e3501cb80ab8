"""Llama 3.2 Vision behind a server, with OpenAI's client.

    mlxvlm serve -p 1234 --isq Q4K -m lamm-mit/Cephalo-Llama-3.2-11B-Vision-Instruct-128k
    python examples/http/llama_vision.py

The image's url is an address, a path on the server's machine (as here), a data: URL or base64 text.
"""

import argparse
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--url", default="http://localhost:1234/v1/")
parser.add_argument("--image", default=str(Path(__file__).parent.parent / "pictures" / "red-heart-black-square.png"))
args = parser.parse_args()

client = OpenAI(api_key="foobar", base_url=args.url)
completion = client.chat.completions.create(
    model="default",
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": args.image}},
                {"type": "text", "text": "What is in this image?"},
            ],
        }
    ],
    max_tokens=256,
    frequency_penalty=1.0,
    top_p=0.1,
    temperature=0,
)
print(completion.choices[0].message.content)
print(completion.usage)
