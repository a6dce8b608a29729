// The text of wgmma for every number of columns: what wgmma.cuh expands. PTX has one instruction for each N, with N / 2
// accumulator registers as its first operands; inline assembly needs each of them and the numbers of those that follow.
// PTX ISA, section "Asynchronous Warpgroup Level Matrix Instructions: wgmma.mma_async".
#pragma once

// The accumulators' operands, as the list of constraints and as text, from those of 8 columns less.
#define FI_WGMMA_LIST_8(c) "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
#define FI_WGMMA_LIST_16(c) FI_WGMMA_LIST_8(c), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
#define FI_WGMMA_LIST_24(c) FI_WGMMA_LIST_16(c), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11])
#define FI_WGMMA_LIST_32(c) FI_WGMMA_LIST_24(c), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15])
#define FI_WGMMA_LIST_40(c) FI_WGMMA_LIST_32(c), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19])
#define FI_WGMMA_LIST_48(c) FI_WGMMA_LIST_40(c), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23])
#define FI_WGMMA_LIST_56(c) FI_WGMMA_LIST_48(c), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27])
#define FI_WGMMA_LIST_64(c) FI_WGMMA_LIST_56(c), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
#define FI_WGMMA_LIST_72(c) FI_WGMMA_LIST_64(c), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35])
#define FI_WGMMA_LIST_80(c) FI_WGMMA_LIST_72(c), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39])
#define FI_WGMMA_LIST_88(c) FI_WGMMA_LIST_80(c), "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43])
#define FI_WGMMA_LIST_96(c) FI_WGMMA_LIST_88(c), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47])
#define FI_WGMMA_LIST_104(c) FI_WGMMA_LIST_96(c), "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51])
#define FI_WGMMA_LIST_112(c) FI_WGMMA_LIST_104(c), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55])
#define FI_WGMMA_LIST_120(c) FI_WGMMA_LIST_112(c), "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59])
#define FI_WGMMA_LIST_128(c) FI_WGMMA_LIST_120(c), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
#define FI_WGMMA_LIST_136(c) FI_WGMMA_LIST_128(c), "+f"(c[64]), "+f"(c[65]), "+f"(c[66]), "+f"(c[67])
#define FI_WGMMA_LIST_144(c) FI_WGMMA_LIST_136(c), "+f"(c[68]), "+f"(c[69]), "+f"(c[70]), "+f"(c[71])
#define FI_WGMMA_LIST_152(c) FI_WGMMA_LIST_144(c), "+f"(c[72]), "+f"(c[73]), "+f"(c[74]), "+f"(c[75])
#define FI_WGMMA_LIST_160(c) FI_WGMMA_LIST_152(c), "+f"(c[76]), "+f"(c[77]), "+f"(c[78]), "+f"(c[79])
#define FI_WGMMA_LIST_168(c) FI_WGMMA_LIST_160(c), "+f"(c[80]), "+f"(c[81]), "+f"(c[82]), "+f"(c[83])
#define FI_WGMMA_LIST_176(c) FI_WGMMA_LIST_168(c), "+f"(c[84]), "+f"(c[85]), "+f"(c[86]), "+f"(c[87])
#define FI_WGMMA_LIST_184(c) FI_WGMMA_LIST_176(c), "+f"(c[88]), "+f"(c[89]), "+f"(c[90]), "+f"(c[91])
#define FI_WGMMA_LIST_192(c) FI_WGMMA_LIST_184(c), "+f"(c[92]), "+f"(c[93]), "+f"(c[94]), "+f"(c[95])
#define FI_WGMMA_LIST_200(c) FI_WGMMA_LIST_192(c), "+f"(c[96]), "+f"(c[97]), "+f"(c[98]), "+f"(c[99])
#define FI_WGMMA_LIST_208(c) FI_WGMMA_LIST_200(c), "+f"(c[100]), "+f"(c[101]), "+f"(c[102]), "+f"(c[103])
#define FI_WGMMA_LIST_216(c) FI_WGMMA_LIST_208(c), "+f"(c[104]), "+f"(c[105]), "+f"(c[106]), "+f"(c[107])
#define FI_WGMMA_LIST_224(c) FI_WGMMA_LIST_216(c), "+f"(c[108]), "+f"(c[109]), "+f"(c[110]), "+f"(c[111])
#define FI_WGMMA_LIST_232(c) FI_WGMMA_LIST_224(c), "+f"(c[112]), "+f"(c[113]), "+f"(c[114]), "+f"(c[115])
#define FI_WGMMA_LIST_240(c) FI_WGMMA_LIST_232(c), "+f"(c[116]), "+f"(c[117]), "+f"(c[118]), "+f"(c[119])
#define FI_WGMMA_LIST_248(c) FI_WGMMA_LIST_240(c), "+f"(c[120]), "+f"(c[121]), "+f"(c[122]), "+f"(c[123])
#define FI_WGMMA_LIST_256(c) FI_WGMMA_LIST_248(c), "+f"(c[124]), "+f"(c[125]), "+f"(c[126]), "+f"(c[127])

#define FI_WGMMA_TEXT_8 "%0, %1, %2, %3"
#define FI_WGMMA_TEXT_16 FI_WGMMA_TEXT_8 ", %4, %5, %6, %7"
#define FI_WGMMA_TEXT_24 FI_WGMMA_TEXT_16 ", %8, %9, %10, %11"
#define FI_WGMMA_TEXT_32 FI_WGMMA_TEXT_24 ", %12, %13, %14, %15"
#define FI_WGMMA_TEXT_40 FI_WGMMA_TEXT_32 ", %16, %17, %18, %19"
#define FI_WGMMA_TEXT_48 FI_WGMMA_TEXT_40 ", %20, %21, %22, %23"
#define FI_WGMMA_TEXT_56 FI_WGMMA_TEXT_48 ", %24, %25, %26, %27"
#define FI_WGMMA_TEXT_64 FI_WGMMA_TEXT_56 ", %28, %29, %30, %31"
#define FI_WGMMA_TEXT_72 FI_WGMMA_TEXT_64 ", %32, %33, %34, %35"
#define FI_WGMMA_TEXT_80 FI_WGMMA_TEXT_72 ", %36, %37, %38, %39"
#define FI_WGMMA_TEXT_88 FI_WGMMA_TEXT_80 ", %40, %41, %42, %43"
#define FI_WGMMA_TEXT_96 FI_WGMMA_TEXT_88 ", %44, %45, %46, %47"
#define FI_WGMMA_TEXT_104 FI_WGMMA_TEXT_96 ", %48, %49, %50, %51"
#define FI_WGMMA_TEXT_112 FI_WGMMA_TEXT_104 ", %52, %53, %54, %55"
#define FI_WGMMA_TEXT_120 FI_WGMMA_TEXT_112 ", %56, %57, %58, %59"
#define FI_WGMMA_TEXT_128 FI_WGMMA_TEXT_120 ", %60, %61, %62, %63"
#define FI_WGMMA_TEXT_136 FI_WGMMA_TEXT_128 ", %64, %65, %66, %67"
#define FI_WGMMA_TEXT_144 FI_WGMMA_TEXT_136 ", %68, %69, %70, %71"
#define FI_WGMMA_TEXT_152 FI_WGMMA_TEXT_144 ", %72, %73, %74, %75"
#define FI_WGMMA_TEXT_160 FI_WGMMA_TEXT_152 ", %76, %77, %78, %79"
#define FI_WGMMA_TEXT_168 FI_WGMMA_TEXT_160 ", %80, %81, %82, %83"
#define FI_WGMMA_TEXT_176 FI_WGMMA_TEXT_168 ", %84, %85, %86, %87"
#define FI_WGMMA_TEXT_184 FI_WGMMA_TEXT_176 ", %88, %89, %90, %91"
#define FI_WGMMA_TEXT_192 FI_WGMMA_TEXT_184 ", %92, %93, %94, %95"
#define FI_WGMMA_TEXT_200 FI_WGMMA_TEXT_192 ", %96, %97, %98, %99"
#define FI_WGMMA_TEXT_208 FI_WGMMA_TEXT_200 ", %100, %101, %102, %103"
#define FI_WGMMA_TEXT_216 FI_WGMMA_TEXT_208 ", %104, %105, %106, %107"
#define FI_WGMMA_TEXT_224 FI_WGMMA_TEXT_216 ", %108, %109, %110, %111"
#define FI_WGMMA_TEXT_232 FI_WGMMA_TEXT_224 ", %112, %113, %114, %115"
#define FI_WGMMA_TEXT_240 FI_WGMMA_TEXT_232 ", %116, %117, %118, %119"
#define FI_WGMMA_TEXT_248 FI_WGMMA_TEXT_240 ", %120, %121, %122, %123"
#define FI_WGMMA_TEXT_256 FI_WGMMA_TEXT_248 ", %124, %125, %126, %127"

// X(N, the numbers of the 8 operands after the accumulators).
#define FI_WGMMA_SHAPES(X)                       \
  X(8, 4, 5, 6, 7, 8, 9, 10, 11)                 \
  X(16, 8, 9, 10, 11, 12, 13, 14, 15)            \
  X(24, 12, 13, 14, 15, 16, 17, 18, 19)          \
  X(32, 16, 17, 18, 19, 20, 21, 22, 23)          \
  X(40, 20, 21, 22, 23, 24, 25, 26, 27)          \
  X(48, 24, 25, 26, 27, 28, 29, 30, 31)          \
  X(56, 28, 29, 30, 31, 32, 33, 34, 35)          \
  X(64, 32, 33, 34, 35, 36, 37, 38, 39)          \
  X(72, 36, 37, 38, 39, 40, 41, 42, 43)          \
  X(80, 40, 41, 42, 43, 44, 45, 46, 47)          \
  X(88, 44, 45, 46, 47, 48, 49, 50, 51)          \
  X(96, 48, 49, 50, 51, 52, 53, 54, 55)          \
  X(104, 52, 53, 54, 55, 56, 57, 58, 59)         \
  X(112, 56, 57, 58, 59, 60, 61, 62, 63)         \
  X(120, 60, 61, 62, 63, 64, 65, 66, 67)         \
  X(128, 64, 65, 66, 67, 68, 69, 70, 71)         \
  X(136, 68, 69, 70, 71, 72, 73, 74, 75)         \
  X(144, 72, 73, 74, 75, 76, 77, 78, 79)         \
  X(152, 76, 77, 78, 79, 80, 81, 82, 83)         \
  X(160, 80, 81, 82, 83, 84, 85, 86, 87)         \
  X(168, 84, 85, 86, 87, 88, 89, 90, 91)         \
  X(176, 88, 89, 90, 91, 92, 93, 94, 95)         \
  X(184, 92, 93, 94, 95, 96, 97, 98, 99)         \
  X(192, 96, 97, 98, 99, 100, 101, 102, 103)     \
  X(200, 100, 101, 102, 103, 104, 105, 106, 107) \
  X(208, 104, 105, 106, 107, 108, 109, 110, 111) \
  X(216, 108, 109, 110, 111, 112, 113, 114, 115) \
  X(224, 112, 113, 114, 115, 116, 117, 118, 119) \
  X(232, 116, 117, 118, 119, 120, 121, 122, 123) \
  X(240, 120, 121, 122, 123, 124, 125, 126, 127) \
  X(248, 124, 125, 126, 127, 128, 129, 130, 131) \
  X(256, 128, 129, 130, 131, 132, 133, 134, 135)
