"""What Alembic runs: the revisions that are due, on the connection that it is handed."""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"])
# The caller has begun a transaction, and ends it: all of the revisions are done, or none.
context.run_migrations()
