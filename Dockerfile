# docker build -t lowline . && docker run --gpus all -v "$PWD/outputs:/outputs" lowline train cola_60m
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
FROM ${BASE}
# The C++ kernels for CPUs are compiled when they are first needed, and Triton compiles its launchers.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/lowline
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt '.[gguf,eval]'
# Runs write to /outputs/outputs/NAME unless they are told otherwise.
WORKDIR /outputs
ENTRYPOINT ["lowline"]
CMD ["--help"]
