import os

# before vLLM is imported: little memory for its cache, threads left where they are, and no fork of a process with
# threads
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
