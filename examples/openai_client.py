"""The official OpenAI client against Tandem: a streamed chat.

pip install openai
python examples/openai_client.py "Tell me a joke." --url http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat with a model over the OpenAI API.")
    parser.add_argument("message")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="", help="the first one that is served when left out")
    parser.add_argument("--api-key", default="none", help="any, unless the deployment file names tenants")
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.url, api_key=arguments.api_key)
    model = arguments.model or client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": arguments.message}],
        max_tokens=200,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage:
            cached = chunk.usage.prompt_tokens_details.cached_tokens if chunk.usage.prompt_tokens_details else 0
            print(f"\n[{chunk.usage.prompt_tokens} prompt tokens, {cached} of them cached;", end=" ")
            print(f"{chunk.usage.completion_tokens} generated]")


if __name__ == "__main__":
    main()
