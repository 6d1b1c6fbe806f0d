"""Writes a train_gpt.py with variants chosen by TRY (comma list): normuon, cwd, mlpgate, vres, keyshift, kconv, vconv, mix, mixfix, backout.
try_patch.py SOURCE TARGET [SLOPE]: the negative slope is written into the kernels."""
import sys
s = open(sys.argv[1]).read()
slope = float(sys.argv[3]) if len(sys.argv) > 3 else 0.5
def put(old, new, count=1):
    global s
    assert s.count(old) == count, (old, s.count(old))
    s = s.replace(old, new)
put("POLAR_EXPRESS = (", 'POLAR_EXPRESS = (', 1)
put("NORM_EPS = torch.finfo", 'TRY = os.environ.get("TRY", "").split(",")\nNORM_EPS = torch.finfo')
# optimizer
put("""            update = newton_schulz(update, c.muon_backend_steps, coefficients, self.wire)
            if self.world.size == 1:
""", """            update = newton_schulz(update, c.muon_backend_steps, coefficients, self.wire)
            if "normuon" in TRY:
                f, axis = update.float(), 2 if p.shape[1] >= p.shape[2] else 1
                mean = f.square().mean(axis, keepdim=True)
                if not hasattr(self, "second"): self.second = {}
                v = self.second.setdefault(id(p), mean.clone())
                v.lerp_(mean, 0.05)
                g = f * (v.sqrt() + 1e-10).reciprocal()
                update = (g * (f.norm(dim=(1, 2), keepdim=True) / (g.norm(dim=(1, 2), keepdim=True) + 1e-10))).to(update.dtype)
            if self.world.size == 1:
""")
old = "            p.mul_(1 - lr * c.muon_wd).add_(update[: len(p)], alpha=-lr * max(1, p.shape[1] / p.shape[2]) ** 0.5)\n"
put(old, """            if "cwd" in TRY:
                p.addcmul_(p, (p * update[: len(p)] > 0).to(p.dtype), value=-lr * c.muon_wd)
                p.add_(update[: len(p)], alpha=-lr * max(1, p.shape[1] / p.shape[2]) ** 0.5)
            else:
    """ + old)
# slope
if slope != 0.5:
    put("F.leaky_relu(F.linear(h if n is None else n, up_MD), 0.5)", f"F.leaky_relu(F.linear(h if n is None else n, up_MD), {slope})")
    put("tl.where(x < 0, 0.25, 1.0)", f"tl.where(x < 0, {slope ** 2}, 1.0)")
    put("(2 - 3 * (h.to(tl.int32, bitcast=True) >> SHIFT & 1)).to(tl.float32)", f"(2 - {2 + 2 * slope} * (h.to(tl.int32, bitcast=True) >> SHIFT & 1).to(tl.float32))")
# parameters
put("        self.resid_mix = nn.Parameter(", """        groups = next((int(t[7:] or 8) for t in TRY if t.startswith("mlpgate")), 0)
        self.try_mlpgate = zeros(L, groups, c.gate_window) if groups else None
        self.try_vres = zeros(L, c.num_kv_heads) if "vres" in TRY else None
        self.try_kconv = zeros(L, c.num_kv_heads, c.head_dim) if "kconv" in TRY else None
        self.try_vconv = zeros(L, c.num_kv_heads, c.head_dim) if "vconv" in TRY else None
        self.try_mix = nn.Parameter(torch.tensor([0.0, 0.0, 1.0])) if "mix" in TRY else None
        self.try_backout = zeros(1) if "backout" in TRY else None
        self.resid_mix = nn.Parameter(""")
put("    lane_add: Tensor | None     # [source, lane]\n", """    lane_add: Tensor | None     # [source, lane]
    mlpgate: Tensor | None = None
    vres: Tensor | None = None
    kconv: Tensor | None = None
    vconv: Tensor | None = None
""")
put("self.depth_scale, self.parallel_resid_lambdas, self.parallel_post_lambdas)))",
    "self.depth_scale, self.parallel_resid_lambdas, self.parallel_post_lambdas,\n"
    "                                self.try_mlpgate, self.try_vres, self.try_kconv, self.try_vconv)))")
# attention
put("              tap, past: Past | None = None) -> tuple[Tensor, Tensor]:", "              tap, past: Past | None = None, begins=None, first=None) -> tuple[Tensor, Tensor]:")
put("    if past is not None:\n        past.k.index_copy_", """    def before(t):
        return torch.where(begins[None, :, None, None], torch.zeros_like(t), F.pad(t, (0, 0, 0, 0, 1, 0))[:, :-1])
    copies = k.shape[2] // own.shape[2]
    wide = lambda t: t.repeat_interleave(copies, 0)
    if w.kconv is not None:
        k = (k + wide(w.kconv).to(k.dtype) * before(k)).to(k.dtype)
    if "keyshift" in TRY:
        half = (k.shape[3] + 16) // 2
        k = torch.cat((k[..., :half], torch.where(begins[None, :, None, None], k[..., half:], F.pad(k[..., half:], (0, 0, 0, 0, 1, 0))[:, :-1])), -1)
    if w.vconv is not None:
        v = (v + wide(w.vconv).to(v.dtype) * before(v)).to(v.dtype)
        own = (own + w.vconv.to(v.dtype) * before(own)).to(v.dtype)
    now = own
    if w.vres is not None and first is not None:
        v = (v + (wide(w.vres)[:, None] * first.repeat_interleave(copies, 2)).to(v.dtype)).to(v.dtype)
        own = (own + (w.vres[:, None] * first).to(v.dtype)).to(v.dtype)
    if past is not None:\n        past.k.index_copy_""")
put("    return u, out if adapter.o is None else adapter.o.rows_times(w.attn_scale)(n, out)", "    return u, out if adapter.o is None else adapter.o.rows_times(w.attn_scale)(n, out), now")
# mlp
put("    if adapter.mlp is None and not tap:\n        return leaky_mlp(", """    if w.mlpgate is not None:
        h, n = weighted_sum(parts, None, w.depth_scale)
        if w.mlpgate.shape[0] == 1:
            n = (n * (2 * torch.sigmoid(F.linear(n[..., : w.mlpgate.shape[1]], w.mlpgate.to(n.dtype)).float())).sqrt()).to(n.dtype)
            out = leaky_mlp((n,), None, w.up, w.down, False)[0]
            return h + out if onto else out
        out, hidden = leaky_mlp((n,), None, w.up, w.down, False)
        g = 2 * torch.sigmoid(F.linear(n[..., : w.mlpgate.shape[1]], w.mlpgate.to(n.dtype)).float())
        out = (out.unflatten(-1, (g.shape[-1], -1)) * g[..., None]).flatten(-2).to(out.dtype)
        return h + out if onto else out
    if adapter.mlp is None and not tap:\n        return leaky_mlp(""")
# block
put("          adapter: PassAdapters = NO_ADAPTERS, tap=None, past: Past | None = None):", "          adapter: PassAdapters = NO_ADAPTERS, tap=None, past: Past | None = None, begins=None, first=None):")
put("    u, att = attention((*stream, x0), weights, w, segments, rope, shape, adapter, tap, past)", "    u, att, now = attention((*stream, x0), weights, w, segments, rope, shape, adapter, tap, past, begins, first)")
put("        return mlp((u, att), w, adapter, tap, onto=True), None\n", "        return mlp((u, att), w, adapter, tap, onto=True), None, now\n")
put("        return u + att + out, None\n", "        return u + att + out, None, now\n")
put("            (keep[1] * lane + add[0, 1] * att + add[1, 1] * out).to(dtype))", "            (keep[1] * lane + add[0, 1] * att + add[1, 1] * out).to(dtype), now)")
# forward
put("        for slot, i in enumerate(order):\n            flexible(", """        begins, first, ends = None, None, []
        if segments is not None:
            begins = torch.zeros(length + 1, dtype=torch.bool, device=x.device).index_fill_(0, segments.cu_seqlens.long(), True)[:length]
        for slot, i in enumerate(order):\n            flexible(""")
put("            x, lane = run(x, lane,", "            x, lane, now = run(x, lane,")
put("                          cache.past(slot, len(x), at) if cache else None)\n", """                          cache.past(slot, len(x), at) if cache else None, begins, first)
            if first is None and "vres" in TRY:
                first = now
            if i == c.loop_end:
                ends.append(x)
                if len(ends) == 3 and "mixfix" in TRY:
                    x = (0.55 * ends[0] - 0.67 * ends[1] + 1.12 * ends[2]).to(x.dtype)
                if len(ends) == 3 and self.try_mix is not None:
                    x = (self.try_mix[0] * ends[0] + self.try_mix[1] * ends[1] + self.try_mix[2] * ends[2]).to(x.dtype)
                middle = x
""")
put("        if lane is not None:\n            x = {", "        if lane is not None:\n            x = {")
put("\"mlp\": lane}[c.parallel_final_lane]\n        return x\n", """\"mlp\": lane}[c.parallel_final_lane]
        if self.try_backout is not None:
            x = (x - self.try_backout * middle).to(x.dtype)
        return x
""")
open(sys.argv[2], "w").write(s)
