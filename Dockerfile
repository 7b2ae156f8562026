# An image for NVIDIA GPUs (driver 580 or newer, with the NVIDIA container toolkit):
#
#     docker build -t latentwire .
#     docker run --rm --gpus all -v "$PWD/runs:/latentwire/runs" latentwire train testbed_context --run runs/context
#     docker run --rm --gpus all --entrypoint make latentwire gpu     # the tests and benchmarks for a GPU
#
# The base only says to the toolkit what it may bring in: torch's wheels have the CUDA libraries in them.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}

# g++ builds the extension; Triton calls a C compiler and wants Python's headers where it runs, too.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ make python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /latentwire
# torch first and alone: the extension is compiled against it. What follows is built again when a source
# changes, this layer of several GB is not.
RUN pip install torch==2.11.0 triton==3.6.0
COPY constraints.txt ./
RUN pip install -c constraints.txt setuptools wheel pybind11 cmake ninja numpy
COPY . .
RUN pip install --no-build-isolation -c constraints.txt -e ".[dev,lora,gguf,nf4]" \
    && python -c "from latentwire_fast.readers import kv_placement; assert kv_placement.has_extension()"

# Downloaded models and converted GGUF files: mount a volume here to keep them.
ENV HF_HOME=/cache/huggingface LATENTWIRE_CACHE=/cache/latentwire
ENTRYPOINT ["latentwire"]
CMD ["--help"]
