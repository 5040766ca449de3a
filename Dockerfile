# Two images from the same pinned lists, installed by the same script as `make install`:
#   docker build --target cpu  -t tessera:cpu  .
#   docker build --target cuda -t tessera:cuda .      (no GPU is needed to build it)
# CPU build of torch: --build-arg TESSERA_TORCH_INDEX=<address of PyTorch's CPU index>; without it the default index
# decides, and its torch carries the CUDA libraries along.
FROM python:3.11-slim-bookworm AS base
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /tessera
ENV PATH=/tessera/.venv/bin:$PATH \
    OMP_WAIT_POLICY=PASSIVE \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1
COPY . .

FROM base AS cuda
# What the NVIDIA container runtime brings in: CUDA itself, and the management library that fbgemm loads.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN TESSERA_STACK=cuda scripts/setup.sh
CMD ["python", "scripts/doctor.py"]

FROM base AS cpu
ARG TESSERA_TORCH_INDEX=
RUN TESSERA_STACK=cpu scripts/setup.sh
CMD ["python", "scripts/doctor.py"]
