// Numbers in one byte each; blockwise.py says what the codes stand for.

#include "blocks.h"

#include <algorithm>
#include <cstring>

#include "processors.h"

namespace keras_rmsprop {
namespace {

constexpr int32_t kGrowth = 8;
constexpr int32_t kExponent = 0x7f800000;
constexpr int32_t kLeast = 1 << 23, kMost = 253 << 23;  // 2^-126 and 2^126
constexpr float kDraws = 0x1p16f;

inline int32_t BitsOf(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float FloatOf(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Bytes are widened and narrowed in loops of their own: only so are those that compute
// given the longest vectors.

template <bool kHasSign>
EACH_PROCESSOR void DecodeBlock(const Coded& block, float* x) {
  int32_t codes[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    codes[i] = kHasSign ? static_cast<int8_t>(block.codes[i]) : block.codes[i];
  }
  const float scale = kHasSign ? kGrowth * block.scale : block.scale;
  for (int i = 0; i < kBlock; ++i) {
    const int32_t sign = codes[i] >> 31;
    const int32_t code = kHasSign ? (codes[i] ^ sign) - sign : codes[i];
    const float above = static_cast<float>(code + 1);
    const float n = FloatOf(BitsOf(above) & kExponent);
    const float share = (7 * above - 6 * n) * (n * n) * 0x1p-24f;
    const float y = code ? share * scale : 0;
    x[i] = kHasSign ? FloatOf(BitsOf(y) ^ (sign & INT32_MIN)) : y;
  }
}

template <bool kHasSign>
EACH_PROCESSOR void EncodeBlock(const float* x, uint32_t draw, Coded* block) {
  int32_t codes[kBlock], most = 0;
  for (int i = 0; i < kBlock; ++i) {
    // Bits of magnitudes are in the order of these. A NaN has the highest.
    most = std::max(most, BitsOf(x[i]) & INT32_MAX);
  }
  const float scale = kLeast <= most && most <= kMost ? FloatOf(most) : 0;
  const float inverse = scale > 0 ? 1 / scale : 0;
  for (int i = 0; i < kBlock; ++i) {
    float share = FloatOf(BitsOf(x[i]) & INT32_MAX) * inverse;
    share = share < 1 ? share : 1;
    if constexpr (kHasSign) share *= 1.0f / kGrowth;
    const int32_t exponent = std::max((BitsOf(share) >> 23) - 103, 0);
    const int32_t group = (exponent * 171 >> 9) << 23;  // as part of an exponent
    const float n = FloatOf((127 << 23) + group);
    const float above = share * FloatOf((151 << 23) - 2 * group) + 6 * n;
    const float place = above * (kDraws / 7) - kDraws;
    const int32_t whole = static_cast<int32_t>(group ? place : share * 0x1p37f);
    const int32_t drawn = (draw + static_cast<uint32_t>(i) * kElementStride) & 0xffff;
    int32_t code = std::min((whole + drawn) >> 16, kHasSign ? 127 : 255);
    const int32_t sign = BitsOf(x[i]) >> 31;
    codes[i] = kHasSign ? (code ^ sign) - sign : code;
  }
  for (int i = 0; i < kBlock; ++i) block->codes[i] = static_cast<uint8_t>(codes[i]);
  block->scale = scale;
}

}  // namespace

void Decode(const Coded& block, bool has_sign, float* x) {
  has_sign ? DecodeBlock<true>(block, x) : DecodeBlock<false>(block, x);
}

void Encode(const float* x, bool has_sign, uint32_t draw, Coded* block) {
  has_sign ? EncodeBlock<true>(x, draw, block) : EncodeBlock<false>(x, draw, block);
}

}  // namespace keras_rmsprop
