// Keyed random numbers and their exact scaling to a draw's target: fi_core/random.py in fixed-width integers.
//
// Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A number
// depends on its key alone (seed, sample, position, purpose), so any thread can make it.
#pragma once

#include "fi/tile/host_device.cuh"

namespace fi {

// What a number is drawn for; the last word of Philox's counter.
enum class Purpose : unsigned { kDraw = 0, kAccept = 1, kResidual = 2 };

struct PhiloxWords {
  unsigned word[4];
};

// Ten rounds of Philox4x32.
FI_HOST_DEVICE PhiloxWords philox4x32(PhiloxWords counter, unsigned key0, unsigned key1) {
  unsigned c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64 product0 = static_cast<uint64>(c0) * 0xD2511F53u;
    const uint64 product1 = static_cast<uint64>(c2) * 0xCD9E8D57u;
    c0 = static_cast<unsigned>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<unsigned>(product1);
    c2 = static_cast<unsigned>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<unsigned>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A 62-bit random number R = hi * 2^31 + lo, 31 bits each.
struct RandomBits {
  unsigned hi, lo;
};

// R of a key: Philox key (seed low, seed high), counter (position low, position high, sample, purpose); hi and lo are
// the upper 31 bits of the first two words of the block.
FI_HOST_DEVICE RandomBits random_bits(int64 seed, int64 position, int sample, Purpose purpose) {
  const uint64 place = static_cast<uint64>(position), key = static_cast<uint64>(seed);
  const PhiloxWords counter = {{static_cast<unsigned>(place), static_cast<unsigned>(place >> 32),
                                static_cast<unsigned>(sample), static_cast<unsigned>(purpose)}};
  const PhiloxWords block = philox4x32(counter, static_cast<unsigned>(key), static_cast<unsigned>(key >> 32));
  return {block.word[0] >> 1, block.word[1] >> 1};
}

// floor(R * total / 2^62) for 0 <= total < 2^52, exact: every intermediate stays below 2^63. The target of a draw from
// `total` mass: the token is the first kept index whose inclusive cumulative mass exceeds it.
FI_HOST_DEVICE int64 scale_bits(RandomBits bits, int64 total) {
  constexpr uint64 kHalf = (1ull << 31) - 1;
  const uint64 total_hi = static_cast<uint64>(total) >> 31, total_lo = static_cast<uint64>(total) & kHalf;
  const uint64 middle = bits.hi * total_lo + ((bits.lo * total_lo) >> 31);
  const uint64 lower = bits.lo * total_hi + (middle & kHalf);
  return static_cast<int64>(bits.hi * total_hi + (middle >> 31) + (lower >> 31));
}

// floor(fraction * total / 2^31) for 0 <= fraction < 2^31 and 0 <= total < 2^52, exact: the mass that top-p asks for.
FI_HOST_DEVICE int64 scale_fraction(unsigned fraction, int64 total) {
  constexpr uint64 kHalf = (1ull << 31) - 1;
  const uint64 size = static_cast<uint64>(total);
  return static_cast<int64>(fraction * (size >> 31) + ((fraction * (size & kHalf)) >> 31));
}

}  // namespace fi
