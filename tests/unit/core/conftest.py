from polyphase.core import native

collect_ignore = [] if native.is_native() else ["test_native_hashing.py"]
