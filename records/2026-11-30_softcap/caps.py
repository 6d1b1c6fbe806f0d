import sys; sys.path[:0]=['/work/main','/work/main/bench']
import numpy as np, torch, torch.nn.functional as F, lzma
from safetensors.torch import load
from pathlib import Path
import train_gpt as t
from specified import SPECIFIED
torch.set_num_threads(1)
which=sys.argv[1]
env={'DATA_PATH':'/tmp/ev/data','TOKENIZER_PATH':'x'}
if which=='spec':
    c,_=t.load_config({**SPECIFIED,**env}); model=t.GPT(c,torch.device('cpu'))
    t.import_weights(model,{k:v.float() for k,v in load(lzma.open('/work/shared/data/checkpoint/ema_300s_h100.safetensors.xz').read()).items()})
else:
    c,_=t.load_config(env); model=t.GPT(c,torch.device('cpu'))
    t.import_weights(model,t.restore(t.read_artifact(Path('/tmp/ev/out/final_model.int6.pglf'),c)))
for name,path,at in (('val','/tmp/d/fineweb_val_000000.bin',1_000_000),('train shard 0','/tmp/d/fineweb_train_000000.bin',1_000_000),('shard 5','/tmp/d/fineweb_train_000005.bin',1_000_000)):
    tok=np.fromfile(path,'<u2')[512:]; b0=np.flatnonzero(tok[at:]==1)[0]+at
    b=t.to_batch(tok[b0:b0+8193],2048)
    with torch.no_grad():
        n=t.norm(model(b.ids,b.segments)[0]); W=model.tok_emb.float(); y=b.targets[0]
        z=torch.cat([n[i:i+2048]@W.T for i in range(0,len(y),2048)])
        loss=lambda p,tau=1.0: F.cross_entropy(p*torch.tanh(z*tau/p),y).item()
        base=loss(30); print(which,name,round(base,4),{p:round(loss(p)-base,5) for p in (28,28.5,29,29.5,30.5,31)},'tau',{q:round(loss(30,q)-base,5) for q in (.97,1.03)},flush=True)
