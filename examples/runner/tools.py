"""Functions that the Runner calls for the model: python examples/runner/tools.py --model Qwen/Qwen2-VL-7B-Instruct."""

import argparse
import json

from mlxvlm import ChatCompletionRequest, Runner, Which

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo")
args = parser.parse_args()


def weather(name: str, arguments: dict[str, str]) -> str:
    print(f"{name}({arguments})")
    return f"21 degrees in {arguments['city']}"


schema = {"type": "object", "properties": {"city": {"enum": ["Berlin", "Rome"]}}, "required": ["city"]}
tool = {"type": "function", "function": {"name": "weather", "parameters": schema | {"additionalProperties": False}}}

with Runner(which=Which.VisionPlain(model_id=args.model), tool_callbacks={"weather": weather}) as runner:
    request = ChatCompletionRequest(
        model="default",
        messages="How warm is it in Rome?",
        tool_schemas=[json.dumps(tool)],
        tool_choice="required",
        max_tokens=100,
    )
    print(runner.send_chat_completion_request(request).choices[0].message.content)
