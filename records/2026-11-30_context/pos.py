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

a,size=docs[0]
ids=torch.from_numpy(data.tokens[a:a+size].astype(np.int64))[None]; tg=torch.from_numpy(data.tokens[a+1:a+1+size].astype(np.int64))[None]
out=[]
with torch.no_grad():
    for w in (2048,3072,3200,3328,3584,4096,9000):
        seg=t.Segments(torch.tensor([0,size],dtype=torch.int32),int(size),None,w)
        l=model.losses(ids,tg,seg)[0].double()
        out.append(l); print(w, [round(l[i:i+512].mean().item(),3) for i in range(0,size,512)], flush=True)
