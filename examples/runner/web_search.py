"""The model searches by a function of yours: python examples/runner/web_search.py --model Qwen/Qwen2-VL-7B-Instruct.

Without search_callback, Runner(enable_search=True) asks several search engines: pip install 'mlxvlm[search]'.
"""

import argparse

from mlxvlm import ChatCompletionRequest, Runner, WebSearchOptions, Which

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo")
args = parser.parse_args()


def search(query: str) -> list[dict[str, str]]:
    print(f"searching for {query}")
    return [{"title": "Notes", "description": "", "url": "https://example.org/notes", "content": "Hearts are red."}]


with Runner(which=Which.VisionPlain(model_id=args.model), search_callback=search) as runner:
    request = ChatCompletionRequest(
        model="default",
        messages="What colour are hearts?",
        web_search_options=WebSearchOptions(search_context_size="low"),
        max_tokens=100,
    )
    print(runner.send_chat_completion_request(request).choices[0].message.content)
