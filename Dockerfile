# One image for head and workers, jobs and endpoint.
#   docker build --tag moe_ray:cpu .
#   docker build --tag moe_ray:cuda --build-arg TORCH_BACKEND=cu130 .
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
# Which build of torch: cpu, a version of CUDA such as cu130, which then comes along so that the host only needs a
# driver, or nothing for what the package index has.
ARG TORCH_BACKEND=cpu
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_NO_CACHE=1
WORKDIR /opt/moe_ray
RUN pip install --no-cache-dir uv==0.13.9
COPY pyproject.toml constraints.txt ./
# Before the source, so that a change of it installs nothing anew.
RUN uv venv /opt/venv && \
    uv pip install --python /opt/venv/bin/python ${TORCH_BACKEND:+--torch-backend "${TORCH_BACKEND}"} \
        -c constraints.txt -r pyproject.toml
COPY README.md ./
COPY moe_ray moe_ray
COPY jobs jobs
COPY serve_apps serve_apps
COPY cluster cluster
RUN uv pip install --python /opt/venv/bin/python --no-deps .

FROM python:${PYTHON}-slim-bookworm
# g++ compiles the C++ that generates on CPUs, for the CPU that is there; `ray up` copies files with rsync and reaches
# workers from the head with ssh. Debian's security updates are wanted, so versions are not pinned.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends g++ openssh-client rsync && \
    rm -rf /var/lib/apt/lists/*
# Files that `ray up` mounts belong to the first user of the host, who has this id.
RUN useradd --uid 1000 --create-home ray && install --directory --owner=ray /runs
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/moe_ray /opt/moe_ray
# The path of the token is no secret.
# hadolint ignore=DL3064
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 \
    RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/home/ray/secrets/token
WORKDIR /opt/moe_ray
USER 1000
# Store of the cluster's state, dashboard and jobs, endpoint, metrics.
EXPOSE 6379 8265 8000 8080
# The agent of the node; this path needs no token.
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=6 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:52365/api/healthz', timeout=8)"]
CMD ["bash"]
