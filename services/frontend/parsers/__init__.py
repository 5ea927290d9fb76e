"""What a model writes, taken apart while it arrives: text, reasoning, tool calls. One parser per family of models."""
