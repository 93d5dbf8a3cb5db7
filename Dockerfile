# The harness on NVIDIA GPUs. This file has not been built yet. What it installs was tested piece by piece: the wheel
# (tests/test_packaging.py), torch 2.11 with CUDA on an H100 (docs/gpu.md).
#
#   docker build -t llm-inference-harness .
#   mkdir -p results && chmod o+w results       # the image's user, 1000, writes there; a folder made by docker is root's
#   docker run --rm --gpus all -v "$PWD/results:/home/harness/results" -v harness-cache:/cache llm-inference-harness \
#       -m method=gptq,awq bits=3,4 hardware=h100
#
# Records land in the mounted results folder. Models of the hub and of wheels stay in the volume /cache.
FROM python:3.11-slim

# a C compiler: Triton compiles its launchers with it
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /source
# torch in a layer of its own: it is large and changes rarely. The wheel of PyPI brings the CUDA libraries it was built with
ARG TORCH=torch==2.13.0
RUN pip install --no-cache-dir "$TORCH"

COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY conf conf
COPY harness harness
COPY methods methods
RUN pip install --no-cache-dir --constraint constraints.txt ".[joblib,slurm]"

# programs that students write run without privileges: so does everything else here
RUN useradd --create-home harness && mkdir -p /home/harness/results /cache && chown -R harness /home/harness /cache
USER harness
ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
WORKDIR /home/harness
ENTRYPOINT ["harness"]
CMD ["--help"]
