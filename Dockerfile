# An image for every host of a cluster: the package and its recipes, installed by the same `make install` as anywhere.
#
#   docker build -t easyscale .
#   docker run --rm easyscale                                   the demo, on emulated devices
#   docker run --rm --gpus all --network host --shm-size 8g easyscale \
#     .venv/bin/torchrun --nnodes 2 --node-rank <0|1> --nproc-per-node <devices here> \
#     --master-addr <host 0> --master-port 29500 <script>       one executor group per host
#
# Recent CUDA builds of torch no longer carry kernels for older GPU generations. For a cluster with such GPUs choose a
# build that does: --build-arg PIP_ARGS="<pip arguments>". Every host must run the same image.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# g++ is for D2's `portable` policy: the CPU's kernels, and the launchers that Triton compiles.
RUN apt-get update \
    && apt-get install -y --no-install-recommends make g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/lightning_easyscale
COPY Makefile constraints.txt pyproject.toml README.md LICENSE ./
COPY lightning_easyscale lightning_easyscale
COPY conf conf
COPY recipes recipes

ARG PIP_ARGS=""
RUN make install PIP_ARGS="${PIP_ARGS} --no-cache-dir"

CMD ["make", "demo"]
