"""Documents that know little of each other, as a validation shard: python different_works.py TOKENIZER OUT MOST SHARD [SHARD...]

MOST: capitalised words, each in 2 to 150 documents, that a document may share with any other one, over the root of its words.
"""

import collections
import re
import sys

import numpy as np
import sentencepiece as spm

tokenizer, out, most = spm.SentencePieceProcessor(model_file=sys.argv[1]), sys.argv[2], float(sys.argv[3])
documents = []
for path in sys.argv[4:]:
    tokens = np.fromfile(path, np.uint16)[512:]
    starts = np.append(np.flatnonzero(tokens == 1), len(tokens))
    documents += [tokens[a:b] for a, b in zip(starts, starts[1:])]
documents.pop()             # may be cut off
texts = [tokenizer.decode(d[1:].tolist()) for d in documents]
words = [set(re.findall(r"\b[A-Z][a-z]{3,}\b", text)) for text in texts]
count = collections.Counter(word for some in words for word in some)
rare = {word for word, n in count.items() if 2 <= n <= 150}
holders = collections.defaultdict(list)
for i, some in enumerate(words):
    for word in some & rare:
        holders[word].append(i)
kept = []
for i, (some, text) in enumerate(zip(words, texts)):
    shared = collections.Counter(j for word in some & rare for j in holders[word] if j != i)
    if max(shared.values(), default=0) / max(len(re.findall(r"\w+", text)), 20) ** 0.5 < most:
        kept.append(documents[i])
tokens = np.concatenate([*kept, [1]]).astype(np.uint16)
header = np.zeros(256, np.int32)
header[:3] = 20240520, 1, len(tokens)
with open(out, "wb") as f:
    f.write(header.tobytes() + tokens.tobytes())
print(len(kept), "documents", len(tokens), "tokens")
