"""Stock SGLang behind Polyphase: its server is launched, or a running one attached to; nothing in it is changed or imported.

`flags` writes its command line, `dialect` its requests, `load` and `served.kv_events` watch it, `probe` asks what it is like.
"""
