"""What a user may ask of an operator, declared once: a package of its own for each operation.

A package here holds `OPERATION`, a declaration of the standard library alone, and beside it what
the SDK shows of a result. Its messages are in `hvp_protos/v1`, under the same name in each `oneof`
of `job.proto`. Service, ranks, SDK and command line know no operation by name.
"""
