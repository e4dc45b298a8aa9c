"""What adapters to engines have in common that are servers of their own: HTTP on loopback, one connection for each running request.

`process` starts a stock server and explains its end, `engine` turns streams of chunks into step reports, `model_files` reads what the
model card says out of the model's folder. What an engine calls its fields and flags is in the adapter's own folder, behind `Dialect` and
`Observer`. Nothing here imports torch, and an engine may live in an environment of its own.
"""
