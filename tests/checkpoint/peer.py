"""mistral.rs as a process of its own: what it answers on a UQFF folder."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

SCRIPT = """
import json, sys
from mistralrs import ChatCompletionRequest, MultimodalArchitecture, Runner, Which

folder, files, content, count = json.loads(sys.argv[1])
which = Which.MultimodalPlain(model_id=folder, arch=MultimodalArchitecture.Qwen2VL, from_uqff=files)
request = ChatCompletionRequest(
    model="default", messages=[{"role": "user", "content": content}], max_tokens=count, temperature=0.0, logprobs=True,
    top_logprobs=1,
)
choice = Runner(which=which).send_chat_completion_request(request).choices[0]
print("ANSWER" + json.dumps([[entry.token, entry.logprob] for entry in choice.logprobs.content]))
"""


def peer_answer(python: Path, folder: Path, files: str, content: str, count: int) -> list[tuple[str, float]]:
    """Greedy tokens' texts and log-probabilities, at most `count` of them."""
    done = subprocess.run(
        [python, "-c", SCRIPT, json.dumps([str(folder), files, content, count])],
        env={**os.environ, "MISTRALRS_CPU_KV_F32": "1"},  # half precision by itself
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    panics = [line for line in done.stderr.splitlines() if "panicked" in line or "rror" in line]
    assert lines, "\n".join(panics) or done.stdout[-2000:] + done.stderr[-2000:]
    return [(token, logprob) for token, logprob in json.loads(lines[0].removeprefix("ANSWER"))]
