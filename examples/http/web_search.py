"""The model searches the web, on a server with --enable-search: python examples/http/web_search.py."""

import argparse
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--url", default="http://localhost:1234/v1/")
parser.add_argument("--image", default=str(Path(__file__).parent.parent / "pictures" / "red-heart-black-square.png"))
args = parser.parse_args()

client = OpenAI(api_key="foobar", base_url=args.url)
picture = {"type": "image_url", "image_url": {"url": args.image}}
completion = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": [picture, {"type": "text", "text": "What does this symbol stand for?"}]}],
    web_search_options={"search_context_size": "low"},
    max_tokens=256,
)
message = completion.choices[0].message
print(message.content)
for annotation in message.annotations or ():
    print(annotation.url_citation.title, annotation.url_citation.url)
