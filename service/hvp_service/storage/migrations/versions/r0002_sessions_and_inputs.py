"""Sessions, API keys, the inputs of jobs, and the columns that came after 0.1.

Revision ID: 0002

Versions between 0.1 and this revision added tables and columns without one: what is there already
is left as it is.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
JSON = sa.JSON().with_variant(sa.Text, "postgresql")
# What 0.1 could be asked: a search for eigenpairs, its numbers 0 where the server was to choose.
OLD_SPEC = {"operator", "k", "which", "tol", "max_products", "seed", "num_lanczos_vectors"}
JOBS = sa.table(
    "jobs", sa.column("project"), sa.column("id"), sa.column("state"), sa.column("spec", JSON)
)


def upgrade() -> None:
    """Make what is not there, and put jobs of 0.1 that have not ended into the present words."""
    present = sa.inspect(op.get_bind())

    def add(table: str, *columns: sa.Column[object]) -> None:
        known = {column["name"] for column in present.get_columns(table)}
        for column in columns:
            if column.name not in known:
                op.add_column(table, column)

    add("blobs", sa.Column("mention_time", sa.BigInteger, nullable=False, server_default="0"))
    add(
        "checkpoints",
        sa.Column("labels", JSON, nullable=False, server_default="{}"),
        sa.Column("task", sa.String, nullable=False, server_default="causal language modelling"),
        sa.Column("batch_schema", JSON, nullable=True),
    )
    add("data_batches", sa.Column("fields", JSON, nullable=False, server_default="[]"))
    add(
        "vectors",
        sa.Column("session", sa.String, nullable=False, server_default=""),
        sa.Column("expire_time", sa.BigInteger, nullable=True),
        sa.Column("kept", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("batch_id", sa.String, nullable=False, server_default=""),
        sa.Column("shape", JSON, nullable=False, server_default="[]"),
        sa.Column("selection", JSON, nullable=False, server_default="{}"),
        sa.Column("activation", JSON, nullable=False, server_default="{}"),
    )
    add(
        "jobs",
        sa.Column("extends", sa.String, nullable=False, server_default=""),
        sa.Column("earlier", JSON, nullable=True),
    )
    if not present.has_table("sessions"):
        op.create_table(
            "sessions",
            sa.Column("project", sa.String, nullable=False),
            sa.Column("id", sa.String, nullable=False),
            sa.Column("ttl_us", sa.BigInteger, nullable=False),
            sa.Column("create_time", sa.BigInteger, nullable=False),
            sa.Column("expire_time", sa.BigInteger, nullable=False),
            sa.PrimaryKeyConstraint("project", "id"),
        )
    if not present.has_table("job_inputs"):
        op.create_table(
            "job_inputs",
            sa.Column("project", sa.String, nullable=False),
            sa.Column("vector_id", sa.String, nullable=False),
            sa.Column("job_id", sa.String, nullable=False),
            sa.PrimaryKeyConstraint("project", "vector_id", "job_id"),
        )
    if not present.has_table("api_keys"):
        op.create_table(
            "api_keys",
            sa.Column("id", sa.String, nullable=False),
            sa.Column("project", sa.String, nullable=False),
            sa.Column("role", sa.String, nullable=False),
            sa.Column("label", sa.String, nullable=False),
            sa.Column("sha256", sa.String, nullable=False),
            sa.Column("create_time", sa.BigInteger, nullable=False),
            sa.Column("expire_time", sa.BigInteger, nullable=True),
            sa.Column("revoke_time", sa.BigInteger, nullable=True),
            sa.Column("use_time", sa.BigInteger, nullable=True),
            sa.PrimaryKeyConstraint("id"),
        )
        op.create_index("ix_api_keys_project", "api_keys", ["project"])
    if op.get_bind().dialect.name == "sqlite":  # no other database has rows of 0.1
        _translate_jobs()


def _translate_jobs() -> None:
    waiting = sa.select(JOBS).where(JOBS.c.state.in_(("QUEUED", "RUNNING")))
    for row in op.get_bind().execute(waiting).all():
        if isinstance(row.spec, dict) and row.spec.keys() == OLD_SPEC:
            this = JOBS.c.project == row.project, JOBS.c.id == row.id
            op.execute(sa.update(JOBS).where(*this).values(spec=_translated(row.spec)))


def _translated(old: dict[str, Any]) -> dict[str, Any]:
    spec = {name: value for name, value in old.items() if name != "operator"}
    for name in ("max_products", "num_lanczos_vectors"):
        spec[name] = spec[name] or None
    return {"operation": "eigsh", "operator": old["operator"], "spec": spec}


def downgrade() -> None:
    """Older versions work with these tables as they are."""
