"""Messages to tokens and back, without ever encoding history again.

Read first: `dialect` (the promise), then `tiny_dialect` (the small models), `qwen_dialect`, `template_dialect` (any
chat template), with `call_grammar` and `control_text` below them.
"""
