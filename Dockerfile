# txrpc with the PostgreSQL drivers: the coordinator by default, the example services by another command.
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY txrpc txrpc
RUN python -m venv /opt/txrpc && /opt/txrpc/bin/pip install --no-cache-dir '.[postgresql,asyncpg]'

FROM python:3.12-slim
RUN useradd --system --create-home --home-dir /var/lib/txrpc txrpc
COPY --from=build /opt/txrpc /opt/txrpc
COPY examples /opt/examples/examples
ENV PATH=/opt/txrpc/bin:$PATH PYTHONUNBUFFERED=1 PYTHONPATH=/opt/examples
USER txrpc
WORKDIR /var/lib/txrpc
VOLUME /var/lib/txrpc
EXPOSE 7400
HEALTHCHECK --interval=5s --timeout=5s --start-period=5s CMD ["txrpc", "status", "--json", "--coordinator", "127.0.0.1:7400"]
CMD ["txrpc", "coordinator", "--listen", "0.0.0.0:7400", "--log", "sqlite:////var/lib/txrpc/txrpc.db"]
