// Numbers in one byte each, in blocks that share a scale: the twin of blockwise.py.

#ifndef KERAS_RMSPROP_BLOCKS_H_
#define KERAS_RMSPROP_BLOCKS_H_

#include <cstdint>

namespace keras_rmsprop {

constexpr int kBlock = 256;  // numbers of a block
constexpr uint32_t kElementStride = 49471;  // from one number's draw to the next

struct Coded {
  uint8_t codes[kBlock];
  float scale;
};
static_assert(sizeof(Coded) == kBlock + sizeof(float));

// Reads all numbers of a block.
void Decode(const Coded& block, bool has_sign, float* x);

// Keeps numbers in a block: each rounded up or down, as its draw is. The draws go on
// from the first one by a stride. A block with a NaN is kept as zeros.
void Encode(const float* x, bool has_sign, uint32_t draw, Coded* block);

}  // namespace keras_rmsprop

#endif  // KERAS_RMSPROP_BLOCKS_H_
