# The server: no torch, no training, not root. docker build -t llm-difficulty-router .
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY models models
COPY router router
COPY training training
RUN python -m venv /opt/router
RUN /opt/router/bin/pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt '.[postgres,redis]'
RUN /opt/router/bin/pip uninstall --yes --quiet setuptools pip

FROM python:3.11-slim
COPY --from=build /opt/router /opt/router
# What the server writes: rows while the ledger's database is away, the last good policy from a URL, a SQLite ledger.
RUN mkdir -p /var/lib/router && chown 10001:10001 /var/lib/router
VOLUME /var/lib/router
ENV PATH=/opt/router/bin:$PATH \
    HOME=/var/lib/router \
    XDG_DATA_HOME=/var/lib/router \
    XDG_STATE_HOME=/var/lib/router \
    PYTHONDONTWRITEBYTECODE=1 \
    ROUTER_HOST=0.0.0.0 \
    ROUTER_PORT=8080
WORKDIR /var/lib/router
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"ROUTER_PORT\"]}/readyz', timeout=4)"]
# It hears SIGTERM itself, and gives open streams 30 seconds: docker run --stop-timeout 45.
ENTRYPOINT ["router"]
CMD ["serve"]
