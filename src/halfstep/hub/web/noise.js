// Draws the same noise as `sample_noise`, `step_noise` and `between` in halfstep.core.draw on a CPU.
const SIGMA = [
  "0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8", "905724afe1bc683d",
  "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a", "6fe9b308c2d714a5", "a2847615fb9e3cd0",
].map((row) => [...row].map((digit) => parseInt(digit, 16)));
const INITIAL = [
  0x6a09e667f3bcc908n, 0xbb67ae8584caa73bn, 0x3c6ef372fe94f82bn, 0xa54ff53a5f1d36f1n,
  0x510e527fade682d1n, 0x9b05688c2b3e6c1fn, 0x1f83d9abfb41bd6bn, 0x5be0cd19137e2179n,
];
const COLUMNS = [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]];
const DIAGONALS = [[0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14]];

// The 8-byte BLAKE2b digest (RFC 7693) of an ASCII text of at most 128 bytes, as a little-endian integer.
const blake2b = (text) => {
  const wrap = (value) => BigInt.asUintN(64, value);
  const turn = (value, bits) => wrap((value >> bits) | (value << (64n - bits)));
  const block = new DataView(new ArrayBuffer(128));
  [...text].forEach((letter, index) => block.setUint8(index, letter.charCodeAt(0)));
  const words = SIGMA[0].map((index) => block.getBigUint64(8 * index, true));
  const start = INITIAL[0] ^ 0x01010008n;
  const v = [start, ...INITIAL.slice(1), ...INITIAL];
  v[12] ^= BigInt(text.length);
  v[14] = wrap(~v[14]);
  for (let round = 0; round < 12; round++) {
    [...COLUMNS, ...DIAGONALS].forEach(([a, b, c, d], index) => {
      for (const [half, first, second] of [[0, 32n, 24n], [1, 16n, 63n]]) {
        v[a] = wrap(v[a] + v[b] + words[SIGMA[round % 10][2 * index + half]]);
        v[d] = turn(v[d] ^ v[a], first);
        v[c] = wrap(v[c] + v[d]);
        v[b] = turn(v[b] ^ v[c], second);
      }
    });
  }
  return start ^ v[0] ^ v[8];
};

// torch's CPU generator: the Mersenne Twister mt19937 with a 32-bit seed. Returns a function that returns the next 32 bits.
const twister = (seed) => {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  let place = 624;
  return () => {
    if (place === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      place = 0;
    }
    let y = state[place++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
};

// Standard normal numbers, as in a contiguous float32 tensor of `size` values filled by torch's normal_.
const normal = (seed, size) => {
  const next = twister(seed);
  const values = new Float32Array(size);
  const pair = (u1, u2) => {
    const radius = Math.sqrt(-2 * Math.log(u1));
    return [radius * Math.cos(2 * Math.PI * u2), radius * Math.sin(2 * Math.PI * u2)];
  };
  if (size < 16) {
    // One by one, in double precision.
    const uniform = () => ((next() & 0x1fffff) * 2 ** 32 + next()) * 2 ** -53;
    for (let i = 0; i < size; i += 2) {
      const u2 = uniform();
      values.set(pair(1 - uniform(), u2).slice(0, size - i), i);
    }
    return values;
  }
  const fill = (first, last) => {
    for (let i = first; i < last; i++) values[i] = (next() & 0xffffff) * 2 ** -24;
  };
  const transform = (first) => {
    for (let i = first; i < first + 8; i++) [values[i], values[i + 8]] = pair(1 - values[i], values[i + 8]);
  };
  fill(0, size);
  for (let i = 0; i + 16 <= size; i += 16) transform(i);
  if (size % 16) {
    // Like torch, redraw the last 16 values.
    fill(size - 16, size);
    transform(size - 16);
  }
  return values;
};

// `step`: the step in which a stochastic sampler draws the noise; null for the initial noise.
const noiseOf = (seed, size, step = null) => {
  const key = step === null ? `('sample', ${seed})` : `('sample', ${seed}, 'step', ${step})`;
  return normal(Number(BigInt.asUintN(32, blake2b(key) >> 1n)), size);
};

// Spherical interpolation from `first` at 0 to `second` at 1.
const between = (first, second, share) => {
  const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);
  const cosine = dot(first, second) / Math.sqrt(dot(first, first) * dot(second, second));
  const angle = Math.acos(Math.min(1, Math.max(-1, cosine)));
  const isLine = angle < 1e-6;
  const a = isLine ? 1 - share : Math.sin((1 - share) * angle) / Math.sin(angle);
  const b = isLine ? share : Math.sin(share * angle) / Math.sin(angle);
  return first.map((value, index) => a * value + b * second[index]);
};
