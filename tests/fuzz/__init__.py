"""The fuzzer: random models, random regularizers, and an oracle that is the model's own source, instrumented. See docs/fuzz.md."""
