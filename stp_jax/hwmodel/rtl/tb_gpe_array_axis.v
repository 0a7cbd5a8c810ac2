// Test bench of gpe_array_axis: plays beats from files into its streams, with pauses drawn at random
// on every stream (PAUSES in 16 of the cycles), and keeps what comes out.
//
// A beat of s_axis_sums starts from zero in the first fold of a row of folds, else from the sums that
// the fold before gave for the same filter. Writes sums.hex, a beat a line with tlast on top, and
// prints the cycles from the first activations taken to the last sums given.
`timescale 1ns / 1ps
module tb_gpe_array_axis;
    parameter ROWS = 2;
    parameter COLUMNS = 2;
    parameter GROUP = 8;
    parameter LOG_DEPTH = 2;
    parameter SLOT_BITS = 8;
    parameter PAUSES = 0;
    parameter SEED = 1;
    parameter FILTERS = 1;
    parameter ROW_FOLDS = 1;     // folds along the reduction, which follow each other
    parameter ACTIVATION_BEATS = 1;
    parameter SLOT_BEATS = 1;
    parameter SUM_BEATS = 1;     // filters of all folds
    parameter MAX_CYCLES = 1;
    localparam PSUM = 32;
    localparam SUMS = COLUMNS * PSUM;

    reg [COLUMNS*GROUP*8-1:0]  activation_beats [0:ACTIVATION_BEATS-1];
    reg [ROWS*SLOT_BITS+1:0]   slot_beats [0:SLOT_BEATS-1];  // {tlast, tuser, tdata}
    reg [SUMS:0]               sum_beats [0:SUM_BEATS-1];    // {tlast, tdata}

    reg aclk = 0, aresetn = 0;
    reg [31:0] activation = 0, slot = 0, first = 0, given = 0, cycles = 0;
    reg [3:0] go = 0;  // which streams may move in this cycle
    integer seed = SEED, n;

    wire activations_ready, slots_ready, first_ready, sums_valid, sums_last;
    wire [SUMS-1:0] sums;
    wire earlier = (first / FILTERS) % ROW_FOLDS != 0;

    wire activations_valid = go[0] & activation < ACTIVATION_BEATS;
    wire slots_valid = go[1] & slot < SLOT_BEATS;
    wire first_valid = go[2] & first < SUM_BEATS & (~earlier | given + FILTERS > first);

    gpe_array_axis #(
        .ROWS(ROWS), .COLUMNS(COLUMNS), .GROUP(GROUP), .LOG_DEPTH(LOG_DEPTH)
    ) dut (
        .aclk(aclk), .aresetn(aresetn),
        .s_axis_activations_tdata(activation_beats[activation]),
        .s_axis_activations_tvalid(activations_valid),
        .s_axis_activations_tready(activations_ready),
        .s_axis_slots_tdata(slot_beats[slot][ROWS*SLOT_BITS-1:0]),
        .s_axis_slots_tuser(slot_beats[slot][ROWS*SLOT_BITS]),
        .s_axis_slots_tlast(slot_beats[slot][ROWS*SLOT_BITS+1]),
        .s_axis_slots_tvalid(slots_valid),
        .s_axis_slots_tready(slots_ready),
        .s_axis_sums_tdata(earlier ? sum_beats[first - FILTERS][SUMS-1:0] : {SUMS{1'b0}}),
        .s_axis_sums_tvalid(first_valid),
        .s_axis_sums_tready(first_ready),
        .m_axis_sums_tdata(sums),
        .m_axis_sums_tlast(sums_last),
        .m_axis_sums_tvalid(sums_valid),
        .m_axis_sums_tready(go[3])
    );

    always @(posedge aclk) if (aresetn) begin
        if (activations_valid & activations_ready) activation <= activation + 1;
        if (slots_valid & slots_ready) slot <= slot + 1;
        if (first_valid & first_ready) first <= first + 1;
        if (sums_valid & go[3]) begin
            sum_beats[given] <= {sums_last, sums};
            given <= given + 1;
        end
        if (activation != 0 | activations_valid & activations_ready) cycles <= cycles + 1;
        if (cycles > MAX_CYCLES) begin
            $display("FAIL: no end after %0d cycles", MAX_CYCLES);
            $finish;
        end
    end

    // A valid beat stays until it is taken, as AXI demands: streams pause only after they moved.
    always @(negedge aclk) for (n = 0; n < 4; n = n + 1)
        if (~go[n] | n == 3 | moved[n]) go[n] = $unsigned($random(seed)) % 16 >= PAUSES;
    reg [2:0] moved = 0;
    always @(posedge aclk) moved <= {first_valid & first_ready, slots_valid & slots_ready,
                                     activations_valid & activations_ready};

    always #1 aclk = ~aclk;

    initial begin
        $readmemh("activation_beats.hex", activation_beats);
        $readmemh("slot_beats.hex", slot_beats);
        repeat (ROWS + COLUMNS + 2) @(negedge aclk);  // the reset passes through the array
        aresetn = 1;
        wait (given == SUM_BEATS);
        @(negedge aclk);
        // The beat appears a cycle after the last sum completes, and is counted a cycle later.
        $display("%0d", cycles - 2);
        $writememh("sums.hex", sum_beats);
        $finish;
    end
endmodule
