"""Documents for tests: a tokenizer of letters, files of lines."""

import json


class Letters:
    """a=1, b=2, ...; EOS 0; BOS 99 where asked for."""

    eos_id = 0

    def __init__(self, bos_id=None):
        self.bos_id = bos_id

    def encode(self, text, *, add_bos=False, add_eos=False):
        ids = [ord(c) - ord("a") + 1 for c in text]
        return [self.bos_id] * (add_bos and self.bos_id is not None) + ids + [0] * add_eos


def write_jsonl(path, texts, key="text"):
    lines = [json.dumps({key: text, "id": number}) for number, text in enumerate(texts)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)
