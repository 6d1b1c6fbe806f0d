"""The network, its losses and GPTQ once more: from the specification, in numpy float64, position by position.

Nothing here comes from train_gpt.py but the names of tensors in files: the tests compare the two.
"""

import numpy as np

EPS = 2.0 ** -23        # of float32: RMS norm's epsilon
BOS = 1


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def rms_norm(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)


def segment_starts(ids, limit):
    """For every position, where its segment starts: at a BOS, at 0, or `limit` tokens after the last start."""
    out, start = [], 0
    for t, token in enumerate(ids):
        if token == BOS or t - start == limit:
            start = t
        out.append(start)
    return out


def rotate(x, position, dims, base):
    """Rotary embedding of one head vector: dimension i of the first half turns with dimension i of the second."""
    out = np.array(x, np.float64)
    half = dims // 2
    for i in range(half):
        angle = position * base ** (-2 * i / dims)
        c, s = np.cos(angle), np.sin(angle)
        out[i] = x[i] * c + x[i + half] * s
        out[i + half] = x[i + half] * c - x[i] * s
    return out


def attention(q, k, v, starts):
    """q [T, H, d], k and v [T, K, d]; position t sees starts[t]..t. Plain softmax, one head and position at a time."""
    T, H, d = q.shape
    group = H // k.shape[1]
    y = np.zeros((T, H, d))
    for h in range(H):
        for t in range(T):
            seen = range(starts[t], t + 1)
            scores = np.array([q[t, h] @ k[j, h // group] / np.sqrt(d) for j in seen])
            p = np.exp(scores - scores.max())
            p /= p.sum()
            for weight, j in zip(p, seen):
                y[t, h] += weight * v[j, h // group]
    return y


def remove_own_value(y, v):
    out = np.array(y)
    group = y.shape[1] // v.shape[1]
    for t in range(len(y)):
        for h in range(y.shape[1]):
            unit = v[t, h // group] / np.linalg.norm(v[t, h // group])
            out[t, h] = y[t, h] - (y[t, h] @ unit) * unit
    return out


def smear(x, ids, gate, strength):
    """x_t += strength * sigmoid(gate . x_t[:window]) * x_{t-1}, but nothing at BOS or at the row's start."""
    out = np.array(x)
    for t in range(1, len(x)):
        if ids[t] != BOS:
            out[t] = x[t] + strength * sigmoid(gate @ x[t, : len(gate)]) * x[t - 1]
    return out


def layer_order(c, loops):
    """Passes one by one, and the number of encoder passes."""
    order = []
    for i in range(c.num_layers):
        if c.num_loops and i == c.loop_start:
            for _ in range(loops + 1):
                for j in range(c.loop_start, c.loop_end + 1):
                    order.append(j)
        elif not (c.num_loops and c.loop_start < i <= c.loop_end):
            order.append(i)
    return order, len(order) // 2


class Reference:
    """weights: file name -> array. c: the configuration (only its values are read)."""

    def __init__(self, weights, c):
        self.w, self.c = {name: np.asarray(t, np.float64) for name, t in weights.items()}, c

    def attend(self, i, n, starts, context):
        c, w = self.c, self.w
        T, H, d = len(n), c.num_heads, c.model_dim // c.num_heads
        base = c.rope_base
        if c.rope_yarn and context > c.rope_train_seq_len:
            base = base * (context / c.rope_train_seq_len) ** (c.rope_dims / (c.rope_dims - 2))
        p = f"blocks.{i}.attn."
        q_raw = n @ w[p + "c_q.weight"].T
        q = rms_norm(q_raw.reshape(T, H, d))
        k = rms_norm((n @ w[p + "c_k.weight"].T).reshape(T, c.num_kv_heads, d))
        v = (n @ w[p + "c_v.weight"].T).reshape(T, c.num_kv_heads, d)
        for t in range(T):
            for h in range(H):
                q[t, h] = rotate(q[t, h], t, c.rope_dims, base) * w[p + "q_gain"][h]
            for h in range(c.num_kv_heads):
                k[t, h] = rotate(k[t, h], t, c.rope_dims, base)
        y = attention(q, k, v, starts)
        if i >= c.num_layers - c.xsa_last_n:
            y = remove_own_value(y, v)
        for t in range(T):
            for h in range(H):
                if c.sparse_attn_gate_enabled:
                    g = w[p + "attn_gate_w"][h]
                    y[t, h] *= sigmoid(c.sparse_attn_gate_scale * (g @ n[t, : c.gate_window]))
                elif c.gated_attn_enabled:
                    y[t, h] *= sigmoid(w[p + "attn_gate_w"][h] @ n[t])
                elif c.attn_out_gate_enabled:
                    source = (q_raw if c.attn_out_gate_src == "proj" else n)[t, : c.gate_window]
                    y[t, h] *= 2 * sigmoid(w[p + "attn_gate_w"][h] @ source)
        return y.reshape(T, -1), w[f"blocks.{i}.attn_scale"] * (y.reshape(T, -1) @ w[p + "proj.weight"].T)

    def hidden(self, i, n):
        z = n @ self.w[f"blocks.{i}.mlp.fc.weight"].T
        return np.where(z > 0, z, 0.5 * z) ** 2

    def final_stream(self, ids, limit, loops=None, record=None):
        """Token ids of one packed row -> final stream [T, D]. record(name, inputs) sees every matrix's inputs."""
        c, w = self.c, self.w
        record = record or (lambda name, x: None)
        ids = list(ids)
        starts = segment_starts(ids, limit)
        x = w["tok_emb.weight"][ids]
        if c.smear_gate_enabled:
            x = smear(x, ids, w["smear_gate.weight"][0], w["smear_lambda"][0])
        x = x0 = rms_norm(x)
        mlp_lane, skips = None, []
        order, encoder = layer_order(c, c.num_loops if loops is None else loops)
        for slot, i in enumerate(order):
            two_lanes = 0 < c.parallel_start_layer <= i
            if two_lanes and mlp_lane is None:
                mlp_lane = x                        # before the skip, which enters the attention lane only
            if slot >= encoder and skips:
                k = slot - encoder
                incoming = w["skip_weights"][k] * skips.pop()
                if c.skip_gates_enabled:
                    g = sigmoid(w["skip_gates"][k])
                    x = (1 - g) * incoming + g * x
                else:
                    x = x + incoming
            scale = 1 / np.sqrt(i + 1) if c.ln_scale else 1.0
            mix = w[f"blocks.{i}.resid_mix"]
            u = mix[0] * x + mix[1] * x0
            n = scale * rms_norm(u)
            y, att = self.attend(i, n, starts, limit)
            record(f"blocks.{i}.attn", n)
            record(f"blocks.{i}.attn.proj", y)
            down, b = w[f"blocks.{i}.mlp.proj.weight"], w[f"blocks.{i}.mlp_scale"]
            if two_lanes:
                m = scale * rms_norm(mlp_lane)
            elif 0 <= c.parallel_residual_start <= i:
                m = scale * rms_norm(u)
            else:
                x = u + att
                m = scale * rms_norm(x)
            hidden = self.hidden(i, m)
            record(f"blocks.{i}.mlp.fc", m)
            record(f"blocks.{i}.mlp.proj", hidden)
            out = b * (hidden @ down.T)
            if two_lanes:
                r, p = w["parallel_resid_lambdas"][i], w["parallel_post_lambdas"][i]
                x, mlp_lane = (r[0] * x + p[0, 0] * att + p[1, 0] * out, r[1] * mlp_lane + p[0, 1] * att + p[1, 1] * out)
            elif 0 <= c.parallel_residual_start <= i:
                x = u + att + out
            else:
                x = x + out
            if slot < encoder:
                skips.append(x)
        if mlp_lane is not None:
            x = {"mean": (x + mlp_lane) / 2, "attn": x, "mlp": mlp_lane}[c.parallel_final_lane]
        return x

    def losses(self, ids, targets, limit, loops=None, record=None):
        x = rms_norm(self.final_stream(ids, limit, loops, record))
        if record:
            record("head", x)
        logits = x @ self.w["tok_emb.weight" if self.c.tie_embeddings else "lm_head.weight"].T
        z = self.c.logit_softcap * np.tanh(logits / self.c.logit_softcap)
        top = z.max(-1)
        lse = top + np.log(np.exp(z - top[:, None]).sum(-1))
        return lse - z[np.arange(len(z)), list(targets)]


def gptq(w, h, step, q_max, damping=0.01):
    """One matrix, column by column in order of falling diag H, no blocks: OBQ with the inverse Hessian shrinking.

    After each column the inverse Hessian of the columns that are left is recomputed from H itself.
    """
    w, h = np.array(w, np.float64), np.array(h, np.float64)
    dead = np.diag(h) <= 0
    h[dead] = 0
    h[:, dead] = 0
    h[dead, dead] = 1
    w[:, dead] = 0
    damped = h + damping * np.diag(h).mean() * np.eye(len(h))
    left = list(np.argsort(-np.diag(h), kind="stable"))
    q = np.zeros(w.shape, np.int64)
    while left:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        j = left[0]
        q[:, j] = np.clip(np.round(w[:, j] / step), -q_max, q_max)
        error = (w[:, j] - q[:, j] * step) / inverse[0, 0]
        w[:, left] -= np.outer(error, inverse[0])
        left = left[1:]
    return q
