"""Operations, the questions that a user may ask of an operator: each has a package of its own.

A package here holds `OPERATION`, a declaration that needs the standard library alone, and the SDK's
record of a result. Its messages are in `hvp_protos/v1`, under the same name in each `oneof` of
`job.proto`. Service, ranks, SDK and command line know no operation by name.
"""
