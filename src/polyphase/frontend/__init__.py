"""The HTTP surface: from an OpenAI request to tokens of workers and back to text.

    body ─► openai_types ─► validation ─► prompts ─► dispatch ─► assembly ─► chat_format | completion_format ─► stream
            known fields    ranges        token ids  workers     text         JSON                               HTTP

In come HTTP requests, the registry's news, the workers' outputs and events; out go submits and cancels to workers, and text to clients. It
never loads a model: what it needs to know of one comes in the model card that a worker hands out. Every request that was accepted ends in
one terminal message, a finish reason or an error, and gives back what was booked for it.
"""
