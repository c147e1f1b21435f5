"""Alembic's environment: the database is the one of the settings."""

from alembic import context

from sutazai import db
from sutazai.models import metadata

if context.is_offline_mode():
    context.configure(url=db.url(), target_metadata=metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    with db.migrator().connect() as connection:
        context.configure(connection=connection, target_metadata=metadata)
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()
