"""The model asks for a function, gets its result, answers: python examples/http/tools.py."""

import argparse
import json
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--url", default="http://localhost:1234/v1/")
parser.add_argument("--image", default=str(Path(__file__).parent.parent / "pictures" / "red-heart-black-square.png"))
args = parser.parse_args()

client = OpenAI(api_key="foobar", base_url=args.url)
schema = {"type": "object", "properties": {"city": {"enum": ["Berlin", "Rome"]}}, "required": ["city"]}
weather = {"name": "weather", "parameters": schema | {"additionalProperties": False}}
picture = {"type": "image_url", "image_url": {"url": args.image}}
question = {"type": "text", "text": "Is it warm enough in Rome for what is in this picture?"}
messages = [{"role": "user", "content": [picture, question]}]
tools = [{"type": "function", "function": weather}]
answer = client.chat.completions.create(model="default", messages=messages, tools=tools, tool_choice="required")
messages.append(answer.choices[0].message)
for call in answer.choices[0].message.tool_calls:
    city = json.loads(call.function.arguments)["city"]
    print(f"{call.function.name}({city})")
    messages.append({"role": "tool", "tool_call_id": call.id, "content": f"21 degrees in {city}"})
answer = client.chat.completions.create(model="default", messages=messages, max_tokens=100)
print(answer.choices[0].message.content)
