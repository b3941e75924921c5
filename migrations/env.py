"""How Alembic runs the steps in versions/: on the connection and in the transaction that db.py hands over."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=False)
context.run_migrations()
