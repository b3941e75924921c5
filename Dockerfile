# The service without any model: weights, users and compiled code live in the volume /data.
# The root file system may be mounted read-only, with a tmpfs on /tmp.
FROM python:3.11.13-slim-bookworm

# The CPU kernels (on a CPU) and Triton (on a GPU) call a compiler at run time, not only here.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# A passwd entry, because torch asks who it runs as. A new volume on /data takes over this folder's owner.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /data --shell /usr/sbin/nologin app \
    && install -d -o app -g app -m 700 /data

WORKDIR /app
# The checkout may come from a umask of 077, and the app is another user.
COPY --chmod=644 requirements.txt .
RUN pip install --no-cache-dir --disable-pip-version-check -r requirements.txt
COPY --chmod=755 . .

# Compiled code goes to the volume: it must be kept, and /tmp may forbid running what lies there.
ENV HOST=0.0.0.0 \
    PORT=5000 \
    DATA_DIR=/data \
    HOME=/data \
    HF_HOME=/data/hub \
    TORCHINDUCTOR_CACHE_DIR=/data/compiled/inductor \
    TRITON_CACHE_DIR=/data/compiled/triton \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

USER 10001:10001
VOLUME /data
EXPOSE 5000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/healthz', timeout=4)"]
CMD ["gunicorn", "app:create_app()"]
