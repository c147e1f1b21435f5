"""Where the stores are; workers of peers are programs of their own, so it comes by environment."""

import os

DATABASE = os.environ.get("BENCH_DATABASE_URL", "")
BROKER = os.environ.get("BENCH_BROKER_URL", "")
RESULTS = os.environ.get("BENCH_RESULTS_URL", "")
SQLALCHEMY = DATABASE.replace("postgresql://", "postgresql+psycopg://")
