def find_blocks(module):
    out=[]
    for n,m in module.named_modules():
        b=getattr(m,"blocks",None)
        if b is not None: out += [(f"{n}.blocks.{i}",x) for i,x in enumerate(b)]
    return out
