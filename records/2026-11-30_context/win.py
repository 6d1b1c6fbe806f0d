import sys; sys.path.insert(0,'/work/main')
import os, numpy as np, torch, time
import train_gpt as t
from pathlib import Path
torch.set_num_threads(1)
w=int(sys.argv[1]); yarn=sys.argv[2] if len(sys.argv)>2 else '0'
c,_=t.load_config(dict(DATA_PATH='/tmp/ev/long',TOKENIZER_PATH='/work/shared/data/tokenizers/fineweb_8192_bpe.model',EVAL_SEQ_LEN=str(w),ROPE_YARN='0'))
data=t.load_validation(c,lambda *a:None)
from dataclasses import replace
model=t.GPT(replace(c,rope_yarn=yarn=='1'),torch.device('cpu'))
coded=t.read_artifact(Path('/tmp/ev/out/final_model.int6.pglf'),c)
t.import_weights(model,t.restore(coded))
docs=t.find_documents(data.tokens)
beyond=nb=whole=nw=0.0
with torch.no_grad():
    for a,size in docs:
        ids=torch.from_numpy(data.tokens[a:a+size].astype(np.int64))[None]; tg=torch.from_numpy(data.tokens[a+1:a+1+size].astype(np.int64))[None]
        seg=t.Segments(torch.tensor([0,size],dtype=torch.int32),int(size),None,w)
        l=model.losses(ids,tg,seg)[0].double()
        whole+=l.sum().item(); nw+=size; beyond+=l[2048:].sum().item(); nb+=max(size-2048,0)
print(w,'yarn' if yarn=='1' else '', 'all', whole/nw, 'beyond 2048', beyond/nb, int(nb), flush=True)
