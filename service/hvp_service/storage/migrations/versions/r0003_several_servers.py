"""Several servers on one database: calls that run, and the folder of the files.

Revision ID: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the columns."""
    op.add_column("requests", sa.Column("owner", sa.String, nullable=False, server_default=""))
    op.add_column(
        "requests", sa.Column("lease_expire", sa.BigInteger, nullable=False, server_default="0")
    )
    op.add_column(
        "uploads", sa.Column("busy_until", sa.BigInteger, nullable=False, server_default="0")
    )
    op.add_column("server", sa.Column("folder", sa.String, nullable=False, server_default=""))


def downgrade() -> None:
    """Older versions work with these tables as they are."""
