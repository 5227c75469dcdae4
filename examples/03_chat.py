"""Hold a conversation of two turns; the second finds the first in the KV cache.

The bundled model completes code and does not chat: to get sensible answers, give a chat model's folder or Hugging Face
name as an argument, such as Qwen/Qwen3-0.6B.
"""

import sys

from mili import LLM, SamplingParams

questions = ["Write a function that reverses a string.", "And now one that reverses a list."]
messages = [{"role": "system", "content": "You are a programmer. Answer with code only."}]

with LLM(*sys.argv[1:2]) as llm:
    params = SamplingParams(temperature=0.0, max_tokens=40)
    for question in questions:
        messages.append({"role": "user", "content": question})
        print(f"user: {question}\nassistant: ", end="")
        for output in llm.stream_chat(messages, params, chat_template_kwargs={"enable_thinking": False}):
            print(output.delta, end="", flush=True)
        print(f"\n[{output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens were cached]\n")
        messages.append({"role": "assistant", "content": output.text})
