"""How Alembic runs the steps in versions/: on the connection and in the transaction that db.py hands over."""

import logging

from alembic import context

logging.getLogger("alembic").setLevel(logging.WARNING)  # it would tell of itself at every start
context.configure(connection=context.config.attributes["connection"], transactional_ddl=False)
context.run_migrations()
